"""What runs inside vLLM's own processes: the child, the server's middleware, the worker that receives weights."""
