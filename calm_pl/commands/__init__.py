"""The words after `calm`: a module each, imported when it is asked for."""
