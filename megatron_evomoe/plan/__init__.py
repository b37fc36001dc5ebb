"""What a run needs before it is started: memory per rank, communication, and which layouts fit
(docs/plan.md).
"""
