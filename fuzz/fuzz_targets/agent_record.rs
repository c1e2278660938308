#![no_main]

farshore_fuzz::target!(agent::fuzz::agent_record);
