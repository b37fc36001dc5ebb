"""The routers' modules; `moe/router.py` lists them."""
