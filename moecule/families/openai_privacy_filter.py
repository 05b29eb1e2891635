"""OpenAI's privacy filter."""

from moecule.family import Family

FAMILY = Family("openai_privacy_filter", router="router")
