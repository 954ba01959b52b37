"""What a model talks to over several turns: its tools, its games, and the tokens of what is said."""
