"""Agents with a loop of their own, which ask the model by OpenAI's chat API."""
