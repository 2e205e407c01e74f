"""Runs on several devices and processes: the mesh, sharding rules, compiled programs and communication."""
