"""Answers of an exported model: the loaded model, a dialogue with it, and the chat on a terminal."""
