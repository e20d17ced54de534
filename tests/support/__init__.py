"""What tests share: small data sets, models and runs, servers, and clusters."""
