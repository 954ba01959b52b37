"""What runs came to, for human eyes: a page to browse in, a picture, a table. Reads run folders, and nothing else."""
