"""Flows, the command line and parameters: how stages are put together and run."""
