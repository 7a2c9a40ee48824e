"""Programs built on the library. No other part of the library imports them."""
