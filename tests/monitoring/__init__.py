"""Metrics as a real Prometheus has them, alerts as promtool judges them."""
