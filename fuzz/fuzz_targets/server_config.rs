#![no_main]

farshore_fuzz::target!(process_server::fuzz::server_config);
