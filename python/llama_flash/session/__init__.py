"""Flash offload of a loaded model: what stands behind `llm.flash`."""
