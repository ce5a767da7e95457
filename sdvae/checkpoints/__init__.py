"""Loading and saving of autoencoders: which files hold one, what their keys mean, and how they are replaced safely."""
