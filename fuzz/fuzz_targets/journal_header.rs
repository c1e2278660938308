#![no_main]

farshore_fuzz::target!(process_server::fuzz::journal_header);
