"""What codegen emitted, committed. Imports torch alone."""
