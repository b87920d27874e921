"""What several tests need: small federations, models, runs and records."""
