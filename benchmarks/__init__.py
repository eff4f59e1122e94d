"""Measurements of offload_engine, and the pipelines that they, the tests and the demo run."""
