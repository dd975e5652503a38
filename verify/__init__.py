"""Measurement against prediction: coordinate checks, transfer sweeps, tracing."""
