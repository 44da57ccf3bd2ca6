"""From a source of images to a verified set of captions: the pipeline, its prompts, its filters and its exports."""
