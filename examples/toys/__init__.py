"""Small models whose training shows how attention comes to be what it is (notebooks/05)."""
