//! Sockets between guest and host, with a whole VM.

use std::path::Path;

use anemone_guest_init::place::Place;
use anemone_guest_init::sockets;

use crate::vm::{self, Result, Vm};

/// Bytes in each of the four directions.
const BYTES: u64 = 4 << 20;

/// Megabytes in both directions over connections of both sides, half-closed at their ends.
pub fn streams(place: &Place) -> Result<()> {
    let socket = place.scratch("vsock.sock");
    let path = Path::new(&socket);
    let server = sockets::serve(path).map_err(|e| format!("{socket}: {e}"))?;
    vm::give_to_user(place, &sockets::host_path(path)).map_err(|e| format!("{socket}: {e}"))?;
    let option = format!("socket={socket},cid=77");
    let mut vm = Vm::start(
        place,
        &format!("vsock,poweroff anemone.vsock={BYTES}"),
        &["--vsock", &option],
    )?;
    vm.wait_for("guest: vsock listens")?;
    sockets::exchange(path, BYTES, false).map_err(|e| format!("to the guest: {e}"))?;
    vm.expect_exit(0)?;
    let echoed = server.join().map_err(|_| "a thread died")?;
    let echoed = echoed.map_err(|e| format!("from the guest: {e}"))?;
    if echoed != BYTES {
        return Err(format!("{echoed} of {BYTES} bytes"));
    }
    vm.expect_said(&[
        &format!("guest: vsock {BYTES} bytes to the host and back"),
        &format!("guest: vsock {BYTES} bytes from the host and back"),
        "guest: done",
    ])
}
