"""What a user writes: models, placements, requests, limits; their checks."""
