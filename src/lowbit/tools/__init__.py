"""What runs models and measures them: imported by the command line and by users, never by the library itself."""
