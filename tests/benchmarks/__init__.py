"""Measurements. ``make bench`` runs them all; nothing here is asserted by a clock in a test."""
