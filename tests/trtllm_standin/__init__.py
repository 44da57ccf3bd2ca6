"""A package that stands in for tensorrt_llm in tests: generated from its recorded API, with a reference model."""
