"""How a run is saved, published, found, verified and loaded."""
