from tests.families import family_folder, family_model

__all__ = ["family_folder", "family_model"]
