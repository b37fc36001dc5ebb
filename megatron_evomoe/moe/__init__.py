"""Routers, mixture layers, and the evolution of experts."""
