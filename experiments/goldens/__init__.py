"""What made the goldens of the tests."""
