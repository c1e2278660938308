#![no_main]

farshore_fuzz::target!(agent::fuzz::map_file);
