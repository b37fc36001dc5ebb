"""Predicts memory per rank, communication, and which layouts fit, before a run starts (docs/plan.md)."""
