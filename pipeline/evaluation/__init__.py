"""Teacher and student measured in the same way, side by side, and the page that says how they did."""
