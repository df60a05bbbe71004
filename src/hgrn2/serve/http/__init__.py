"""An HTTP server over the engine, with OpenAI's interface; it needs the extra "serve"."""
