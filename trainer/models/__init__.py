"""Session encoders, heads, and the recommender that joins them."""
