"""The shared floor: types, messages, wire, bus, registry, settings, logs, lifecycle. Imports none of ours."""
