"""What is uploaded, and the cards that go with it."""
