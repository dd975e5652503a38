"""Description → sizes → rules, with proofs. sympy and networkx; never torch."""
