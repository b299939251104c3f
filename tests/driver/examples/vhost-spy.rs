//! The hostile back end as a program of its own: `vhost-spy SOCKET SECRET PATIENCE`, the secret in
//! hexadecimal. It serves one front end after the other and reports on its standard output.

use std::error::Error;
use std::io::stdout;
use std::os::unix::net::UnixListener;

use anemone_driver::spy;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, secret, patience] = &arguments[..] else {
        return Err("usage: vhost-spy SOCKET SECRET PATIENCE".into());
    };
    let secret = (0..secret.len() / 2)
        .map(|i| u8::from_str_radix(&secret[2 * i..2 * i + 2], 16))
        .collect::<Result<Vec<u8>, _>>()?;
    let patience = patience.parse()?;
    if secret.is_empty() {
        return Err("a secret has at least one byte".into());
    }
    for connection in UnixListener::bind(socket)?.incoming() {
        spy::serve(connection?, &secret, patience, &mut stdout())?;
    }
    Ok(())
}
