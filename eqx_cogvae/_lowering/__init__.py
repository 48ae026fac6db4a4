"""How each operation of the model runs on each platform."""
