"""A small transformer that predicts the next character, with beliefs between its blocks or inside them."""
