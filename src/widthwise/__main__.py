"""``python -m widthwise``: the same command line as the ``widthwise`` script."""

from widthwise.cli import main

if __name__ == "__main__":
    main()
