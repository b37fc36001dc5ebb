"""One answer, or a conversation, from an exported model."""
