"""What starts a run, and what stands around it on the command line."""
