"""From stored samples to the batches of a step."""
