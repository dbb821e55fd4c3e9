"""The stages of the pipeline as tasks: look up, open inputs by key, call one library function, commit one result."""
