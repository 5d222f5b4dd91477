"""What Triton compiles; imported by the first call that runs here, so that nothing else pays for Triton."""
