"""What routing and experts did: measures, their records, and figures from the records alone."""
