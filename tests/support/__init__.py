"""What tests share: small data sets, models and runs, and servers."""
