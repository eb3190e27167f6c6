"""grist: the tiny chat model that ships inside Millrace, and the recipe that makes it (see MODEL_CARD.md)."""
