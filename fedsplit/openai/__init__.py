"""An OpenAI-compatible server at the client: chat programs use a split model through it."""
